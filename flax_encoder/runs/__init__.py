"""Run folders of this library: what they start from, loading them, asking them, handing them on."""
