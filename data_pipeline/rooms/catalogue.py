"""What can stand in a room: object classes and scene types, with their indices in the public label sets.

VOC indices are positions in `configs.tasks.VOC_CLASSES`; ImageNet indices are those of ILSVRC-2012 in the usual
(synset-sorted) order; Places indices are those of `categories_places365.txt`. Where a label set lacks a class, the
nearest one stands in (`jersey` for a person) or there is none.
"""

from dataclasses import dataclass

from configs.tasks import VOC_CLASSES


@dataclass(frozen=True)
class ObjectClass:
    """One class of things.

    Attributes:
        name: unique name.
        imagenet: nearest ImageNet-1k index, or None.
        voc: VOC class, 0 for background.
        structure: belongs to the building or lies flat on it (never salient, no instance boundary of its own).
    """

    name: str
    imagenet: int | None = None
    voc: int = 0
    structure: bool = False


def _voc(name: str) -> int:
    return VOC_CLASSES.index(name)


OBJECT_CLASSES: tuple[ObjectClass, ...] = (
    ObjectClass("wall", structure=True),
    ObjectClass("floor", structure=True),
    ObjectClass("ceiling", structure=True),
    ObjectClass("door", 799, structure=True),  # sliding door
    ObjectClass("window", 904, structure=True),  # window screen
    ObjectClass("curtain", 854, structure=True),  # theater curtain
    ObjectClass("rug", 741, structure=True),  # prayer rug
    ObjectClass("picture", structure=True),
    ObjectClass("clock", 892),  # wall clock
    ObjectClass("dining_table", 532, _voc("diningtable")),
    ObjectClass("coffee_table", 532, _voc("diningtable")),
    ObjectClass("desk", 526),
    ObjectClass("chair", 559, _voc("chair")),  # folding chair
    ObjectClass("stool", 559, _voc("chair")),
    ObjectClass("sofa", 831, _voc("sofa")),  # studio couch
    ObjectClass("armchair", 765, _voc("sofa")),  # rocking chair
    ObjectClass("bed", 564),  # four-poster
    ObjectClass("pillow", 721),
    ObjectClass("nightstand", 493),  # chiffonier
    ObjectClass("wardrobe", 894),
    ObjectClass("cabinet", 493),  # chiffonier
    ObjectClass("tv_bench", 548),  # entertainment center
    ObjectClass("bookshelf", 453),  # bookcase
    ObjectClass("book", 921),  # book jacket
    ObjectClass("table_lamp", 846),
    ObjectClass("floor_lamp", 619),  # lampshade
    ObjectClass("ceiling_lamp", 818),  # spotlight
    ObjectClass("tv", 851, _voc("tvmonitor")),
    ObjectClass("monitor", 664, _voc("tvmonitor")),
    ObjectClass("keyboard", 508),
    ObjectClass("laptop", 620),
    ObjectClass("plant", 738, _voc("pottedplant")),  # pot
    ObjectClass("vase", 883),
    ObjectClass("bottle", 907, _voc("bottle")),  # wine bottle
    ObjectClass("bowl", 659),  # mixing bowl
    ObjectClass("fruit", 950),  # orange
    ObjectClass("cup", 968),
    ObjectClass("plate", 923),
    ObjectClass("ball", 805),  # soccer ball
    ObjectClass("carton", 478),
    ObjectClass("bin", 412),  # ashcan
    ObjectClass("barrel", 427),
    ObjectClass("toilet", 861),  # toilet seat
    ObjectClass("sink", 896),  # washbasin
    ObjectClass("bathtub", 435),
    ObjectClass("towel", 434),  # bath towel
    ObjectClass("washer", 897),
    ObjectClass("stove", 827),
    ObjectClass("fridge", 760),
    ObjectClass("microwave", 651),
    ObjectClass("pan", 567),  # frying pan
    ObjectClass("teddy", 850),
    ObjectClass("blocks", 865),  # toyshop
    ObjectClass("guitar", 402),  # acoustic guitar
    ObjectClass("umbrella", 879),
    ObjectClass("loudspeaker", 632),
    ObjectClass("file_cabinet", 553),  # file
    ObjectClass("person", 610, _voc("person")),  # jersey
    ObjectClass("aeroplane", 404, _voc("aeroplane")),  # airliner
    ObjectClass("bicycle", 671, _voc("bicycle")),  # mountain bike
    ObjectClass("bird", 88, _voc("bird")),  # macaw
    ObjectClass("boat", 914, _voc("boat")),  # yawl
    ObjectClass("bus", 779, _voc("bus")),  # school bus
    ObjectClass("car", 817, _voc("car")),  # sports car
    ObjectClass("cat", 281, _voc("cat")),  # tabby
    ObjectClass("cow", 345, _voc("cow")),  # ox
    ObjectClass("dog", 208, _voc("dog")),  # Labrador retriever
    ObjectClass("horse", 339, _voc("horse")),  # sorrel
    ObjectClass("motorbike", 670, _voc("motorbike")),  # motor scooter
    ObjectClass("sheep", 348, _voc("sheep")),  # ram
    ObjectClass("train", 820, _voc("train")),  # steam locomotive
)
CLASS_INDEX: dict[str, int] = {cls.name: index for index, cls in enumerate(OBJECT_CLASSES)}

# Scene type -> Places365 index.
PLACES_INDEX: dict[str, int] = {
    "bathroom": 45,
    "bedroom": 52,
    "corridor": 106,
    "dining_room": 121,
    "kitchen": 203,
    "library": 212,  # library/indoor
    "living_room": 215,
    "office": 244,
    "playroom": 269,
    "storage_room": 318,
}
SCENE_TYPES: tuple[str, ...] = tuple(PLACES_INDEX)
