"""Read answers by one grammar, which all rewards that compare share."""
