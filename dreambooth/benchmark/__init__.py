"""task=benchmark: a protocol over many subjects, as one command."""
