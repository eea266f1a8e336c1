"""One file per pipeline stage: read the section, call `svam`, write the outs."""
