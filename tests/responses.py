"""What a response reads like, written down once more for the tests."""


def said(tokenizer, prompt, token_ids):
    """Text of response tokens behind a prompt: decoded alone, the toy's words would lack the space between them."""
    asked = tokenizer(prompt)["input_ids"]
    before = tokenizer.decode(asked, skip_special_tokens=True)
    whole = tokenizer.decode([*asked, *token_ids], skip_special_tokens=True)
    assert whole.startswith(before)
    return whole[len(before) :]
