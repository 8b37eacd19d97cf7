"""Speed and memory of the expert layers beside dense layers and other libraries: `modsquad bench`."""
