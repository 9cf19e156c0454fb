"""The launches of one call, recorded, and made again for others like it."""
