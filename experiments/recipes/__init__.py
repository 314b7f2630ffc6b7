"""What the configs of one paper's experiments share."""
