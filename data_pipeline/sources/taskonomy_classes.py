"""The classes that Taskonomy selects as found indoors: 100 of ImageNet's 1000 objects, 63 of the 365 Places scenes.

Its class labels are outputs of networks over all classes. Selecting leaves vectors as long as they are, so that the
task table holds, and takes the probability of every other class: the target is then what the selected classes alone
would give, 0 elsewhere. The official configurations select scenes and train objects on all 1000; the lists are theirs
(`selected_class.npy`; for scenes the array that is used, as `places_class_to_keep.txt` is an older one of 31).
"""

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.tasks import TaskSpec

SELECTED: dict[str, tuple[int, ...]] = {
    "class_object": (
        401, 402, 409, 412, 414, 430, 431, 435, 453, 462, 463, 470, 478, 487, 488, 492, 495, 504, 505, 508,
        519, 520, 521, 526, 527, 528, 530, 532, 533, 534, 539, 545, 546, 548, 550, 553, 559, 564, 579, 588,
        598, 606, 619, 620, 632, 648, 651, 662, 664, 673, 681, 700, 706, 711, 713, 716, 721, 728, 729, 733,
        736, 737, 738, 742, 748, 750, 752, 753, 754, 760, 761, 765, 770, 773, 778, 794, 799, 804, 805, 809,
        825, 827, 831, 844, 846, 849, 851, 859, 861, 882, 883, 892, 894, 897, 904, 905, 907, 923, 968, 999,
    ),
    "class_scene": (
        3, 23, 25, 26, 28, 37, 43, 45, 51, 52, 56, 61, 63, 88, 89, 93, 95, 100, 102, 106, 121,
        124, 126, 129, 131, 133, 135, 156, 165, 176, 177, 179, 182, 203, 208, 215, 217, 228, 240, 241, 244, 246,
        248, 253, 255, 264, 269, 280, 281, 282, 285, 298, 303, 311, 317, 318, 328, 332, 343, 346, 352, 358, 363,
    ),
}  # fmt: skip
"""Task -> its selected classes, by the numbers of ImageNet and Places365."""

# A logit whose softmax is exactly 0 in float32 beside any that a network gives, and still a finite number.
_NEVER = np.float32(-1e4)


def select_classes(spec: TaskSpec, vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a class label whose target is 0 outside the selected classes.

    Args:
        spec: a task of `SELECTED`.
        vector: (C,) over all classes: logits for objects, probabilities for scenes.

    Raises:
        UserError: no selected scene has any probability.
    """
    chosen = list(SELECTED[spec.name])
    selected = np.full_like(vector, _NEVER if spec.target == "class_logits" else 0.0)
    selected[chosen] = vector[chosen]
    if spec.target == "class_probabilities":
        if not (total := selected.sum(dtype=np.float64)) > 0.0:
            raise UserError(f"the file gives none of the {len(chosen)} selected classes any probability")
        selected /= total
    return selected
