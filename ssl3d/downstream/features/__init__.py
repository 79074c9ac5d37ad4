"""What frozen features know: measures, maps, matching."""
