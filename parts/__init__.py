"""Parts that a first reader may skip: they import nothing else of this project, and the files above import them."""
