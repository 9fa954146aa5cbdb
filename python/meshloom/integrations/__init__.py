"""Other people's models under Meshloom's plans."""
