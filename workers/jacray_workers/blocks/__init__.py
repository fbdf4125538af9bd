"""Blocks of parameter Jacobians: kept in factors, multiplied in factors, made dense when somebody asks."""
