"""Everything that the scripts beside this folder share; nothing in here is run by itself."""
