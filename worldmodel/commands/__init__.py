"""One module a command: its Python function, and its words on the command line, which `worldmodel.cli` collects."""
