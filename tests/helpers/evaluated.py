"""Records of examples as perce.evaluate writes them."""

METEOR = "meteor_exact_stem"


def records(users=12, shift=0.0, named=True, turns=1):
    """Two examples per user, with every metric."""
    made = []
    for number in range(2 * users):
        names = ("uses_persona", "uses_another", "reference_uses_persona", "reply_words", "reference_words")
        scores = dict.fromkeys((*names, "rouge1", "rougeL", METEOR), 0.1 + shift / 9)
        losses = {"loss": 30.0, "loss_without": 36.0, "loss_swapped": 33.0, "loss_personal": 9.0, "loss_other": 21.0}
        losses |= {"loss_of_nobody": 30.0, "loss_other_swapped": 22.0}
        made.append(
            {"example": number, "key": str(number), "source": f"rows.jsonl:{number // 2}", "tokens": 10,
             "turn": 1 + number % turns,
             "personal_tokens": 3, "personal_mask": "own", "user_id": f"u{number // 2}" if named else None}
            | {name: value + shift + number / 7 for name, value in losses.items()} | scores
        )  # fmt: skip
    return made
