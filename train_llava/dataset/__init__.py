"""From files to samples: readers, images, archives, streaming, packing, lengths."""
