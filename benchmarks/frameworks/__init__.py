"""Real pipelines and sessions of voice frameworks, with services that play a script."""
