"""The text output of the command line: tables, reports, errors."""
