"""fastjac: exact Jacobian matching without a double backward."""
