"""Pure functions of arrays. Each is one contract, one plain reference and, where it pays, faster backends."""
