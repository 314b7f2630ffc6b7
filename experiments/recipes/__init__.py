"""Recipes: the parts that the configs of one paper's experiments share."""
