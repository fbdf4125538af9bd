"""jacray over HTTP: the service that a team shares, and the client that speaks to it.

The process that listens has no torch and computes nothing: processes of their own do, and files hold what is large.
"""
