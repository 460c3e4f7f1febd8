"""Claims about the whole: a sparse recurrent mixture, exact gradients and a long stream, together."""
