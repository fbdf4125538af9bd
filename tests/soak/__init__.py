"""The service under mixed work for a long time: no error, flat memory, nothing left behind."""
