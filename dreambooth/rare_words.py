"""What an instance prompt says that its class prompt does not."""

from dreambooth.errors import UserError

MARKS = ".,;:!?'\""


def around_the_rare_word(instance_prompt: str, class_prompt: str) -> tuple[str, str]:
    """What stands before and after the words of the instance prompt that the class prompt lacks."""
    words, known = instance_prompt.split(), {word.lower() for word in class_prompt.split()}
    rare = [place for place, word in enumerate(words) if word.lower() not in known]
    if not rare:
        raise UserError(
            f"model.data.instance_prompt '{instance_prompt}' has no word that model.data.regularization_prompt "
            f"'{class_prompt}' lacks; type one before the class noun, such as 'a photo of a sks dog'"
        )
    return " ".join(words[: rare[0]]), " ".join(words[rare[-1] + 1 :])


def rare_word(instance_prompt: str, class_prompt: str | None) -> str:
    """The word that the instance prompt has and the class prompt lacks; UserError when there is none, or several."""
    before, after = around_the_rare_word(instance_prompt, class_prompt or "")
    words = instance_prompt.split()
    rare = words[len(before.split()) : len(words) - len(after.split())]
    if len(rare) > 1:
        raise UserError(
            f"model.data.instance_prompt '{instance_prompt}': which of '{' '.join(rare)}' learns? "
            f"Type the others in model.data.regularization_prompt too, or model.tuning.placeholder_token={rare[0]}"
        )
    return rare[0].strip(MARKS)
