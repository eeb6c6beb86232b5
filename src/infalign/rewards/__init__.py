"""Score (prompt, response) rows: classifiers, functions, servers, several of them."""
