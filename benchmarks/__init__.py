"""mmace-bench: the property suite held against DFT and experiment, for the shipped model or any other calculator."""
