"""From files to tokens: reading, checking rows, sampling, rendering, masks, sequences. No torch here."""
