"""The cheap verifier of `fitted_tiny.yaml`: rules that see only part of what its reward model sees."""


def well_formed(prompts: list[str], completions: list[str]) -> list[float]:
    """One point for a full stop at the end, one for a capital at the start, less one for each word said twice."""
    return [
        float(text.rstrip().endswith(".")) + float(text[:1].isupper()) - len(text.split()) + len(set(text.split()))
        for text in completions
    ]
