"""Categories of the public data sets in their published order, with their numbers of images.

Each triple is (train, test good, test defective). Sources: the papers and archives of the data sets; where only totals are
published, the counts per category are left empty.
"""

Counts = tuple[int, int, int]

MVTEC_AD: dict[str, Counts] = {
    "carpet": (280, 28, 89),
    "grid": (264, 21, 57),
    "leather": (245, 32, 92),
    "tile": (230, 33, 84),
    "wood": (247, 19, 60),
    "bottle": (209, 20, 63),
    "cable": (224, 58, 92),
    "capsule": (219, 23, 109),
    "hazelnut": (391, 40, 70),
    "metal_nut": (220, 22, 93),
    "pill": (267, 26, 141),
    "screw": (320, 41, 119),
    "toothbrush": (60, 12, 30),
    "transistor": (213, 60, 40),
    "zipper": (240, 32, 119),
}
MVTEC_AD_TOTAL: Counts = (3629, 467, 1258)

VISA: dict[str, Counts] = {
    "candle": (900, 100, 100),
    "capsules": (542, 60, 100),
    "cashew": (450, 50, 100),
    "chewinggum": (453, 50, 100),
    "fryum": (450, 50, 100),
    "macaroni1": (900, 100, 100),
    "macaroni2": (900, 100, 100),
    "pcb1": (904, 100, 100),
    "pcb2": (901, 100, 100),
    "pcb3": (905, 101, 100),
    "pcb4": (904, 101, 100),
    "pipe_fryum": (450, 50, 100),
}
VISA_TOTAL: Counts = (8659, 962, 1200)

REAL_IAD = (
    "audiojack bottle_cap button_battery end_cap eraser fire_hood mint mounts pcb phone_battery plastic_nut plastic_plug "
    "porcelain_doll regulator rolled_strip_base sim_card_set switch tape terminalblock toothbrush toy toy_brick transistor1 "
    "usb usb_adaptor u_block vcpill wooden_beads woodstick zipper"
).split()
REAL_IAD_TOTAL: Counts = (36465, 63256, 51329)  # of realiad_jsons; the other json folders are other splits

MVTEC_LOCO: dict[str, Counts] = {
    "breakfast_box": (351, 102, 173),
    "juice_bottle": (335, 94, 236),
    "pushpins": (372, 138, 172),
    "screw_bag": (360, 122, 219),
    "splicing_connectors": (354, 119, 193),
}
MVTEC_LOCO_TOTAL: Counts = (1772, 575, 993)
MVTEC_LOCO_VALIDATION = {
    "breakfast_box": 62,
    "juice_bottle": 54,
    "pushpins": 69,
    "screw_bag": 60,
    "splicing_connectors": 59,
}

BTAD: dict[str, Counts] = {"01": (400, 21, 49), "02": (399, 30, 200), "03": (1000, 400, 41)}
BTAD_TOTAL: Counts = (1799, 451, 290)

DTD_SYNTHETIC = (
    "Blotchy_099 Fibrous_183 Marbled_078 Matted_069 Mesh_114 Perforated_037 Stratified_154 Woven_001 Woven_068 Woven_104 "
    "Woven_125 Woven_127"
).split()
DTD_SYNTHETIC_TOTAL: Counts = (1200, 357, 947)

MPDD: dict[str, Counts] = {
    "bracket_black": (289, 32, 47),
    "bracket_brown": (185, 26, 51),
    "bracket_white": (110, 30, 30),
    "connector": (128, 30, 14),
    "metal_plate": (54, 26, 71),
    "tubes": (122, 32, 69),
}
MPDD_TOTAL: Counts = (888, 176, 282)
