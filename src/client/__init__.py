"""A typed client of the server, for programs and for the command line. Imports nothing of the server."""
