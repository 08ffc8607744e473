"""What the scenes show: concepts with one visual referent and a short name, by kind.

A concept is written as emojibase labels it, or as `label=name` where the label is not what people say. None is
named like a background colour, a place or a kind.
"""

from __future__ import annotations

from dataclasses import dataclass

from blake3 import blake3

HELD_OUT_SHARE = 0.15

KINDS: dict[str, str] = {
    "animal": """
        monkey; gorilla; dog; wolf; fox; raccoon; cat; lion; tiger; leopard; horse; moose; unicorn; zebra; deer;
        bison; cow; pig; boar; ram; goat; camel; llama; giraffe; elephant; mammoth; rhinoceros=rhino;
        hippopotamus=hippo; mouse; hamster; rabbit; chipmunk=squirrel; beaver; hedgehog; bat; bear; koala; panda;
        sloth; otter; skunk; kangaroo; badger; turkey; rooster; penguin; eagle; duck; swan; owl; flamingo; peacock;
        parrot; frog; crocodile; turtle; lizard; snake; whale; dolphin; seal; fish; shark; octopus; crab; lobster;
        shrimp; squid; snail; butterfly; ant; honeybee=bee; lady beetle=ladybug; spider; scorpion; mosquito; worm
        """,
    "food": """
        grapes; watermelon; lemon; banana; pineapple; mango; red apple=apple; pear; cherries; strawberry;
        blueberries; kiwi fruit=kiwi; tomato; olive; coconut; avocado; eggplant; potato; carrot; ear of corn=corn;
        bell pepper=pepper; cucumber; broccoli; garlic; onion; peanuts; bread; croissant; pretzel; bagel; pancakes;
        waffle; cheese wedge=cheese; bacon; hamburger=burger; french fries=fries; pizza; hot dog; sandwich; taco;
        burrito; egg; green salad=salad; popcorn; butter; sushi; dumpling; doughnut=donut; cookie; cupcake; pie;
        chocolate bar=chocolate; candy; lollipop
        """,
    "plant": """
        rose; tulip; sunflower; hibiscus; cactus; palm tree; evergreen tree=pine tree; deciduous tree=oak tree;
        four leaf clover=clover; maple leaf; mushroom; seedling; bouquet; lotus; cherry blossom; herb; potted plant;
        hyacinth
        """,
    "vehicle": """
        locomotive=train; tram; bus; ambulance; fire engine=fire truck; police car; taxi; automobile=car;
        pickup truck; tractor; racing car=race car; motorcycle; motor scooter=scooter; bicycle=bike; skateboard;
        sailboat; canoe; speedboat; ship; airplane=plane; helicopter; rocket; manual wheelchair=wheelchair;
        auto rickshaw=rickshaw; aerial tramway=cable car; sled
        """,
    "clothing": """
        glasses; goggles; necktie=tie; t-shirt=shirt; jeans; scarf; gloves; coat; socks; dress; kimono; bikini;
        shorts; backpack; running shoe=sneaker; hiking boot=boot; high-heeled shoe=heels; crown; top hat;
        billed cap=cap; rescue worker’s helmet=helmet; ring; lab coat; thong sandal=sandal; purse
        """,
    "tool": """
        hammer; axe; pick; dagger; carpentry saw=saw; wrench; screwdriver; ladder; magnet; scissors;
        paintbrush; pencil; key; broom; bucket; toothbrush; syringe; microscope; telescope; flashlight;
        plunger; razor; spoon; compass; paperclip; safety pin; shield; triangular ruler=ruler
        """,
}


@dataclass(frozen=True)
class Concept:
    """One thing that a scene can show: emojibase's label, the name asked for, and its kind."""

    label: str
    name: str
    kind: str

    @property
    def held_out(self) -> bool:
        """Whether it is kept from training in every style: decided by its name's hash, so by nothing chosen."""
        share = int.from_bytes(blake3(self.name.encode()).digest(8)) / 2**64
        return share < HELD_OUT_SHARE


def all_concepts() -> tuple[Concept, ...]:
    """Every concept, kind by kind."""
    return tuple(
        Concept(label, name or label, kind)
        for kind, text in KINDS.items()
        for label, _, name in (entry.strip().partition("=") for entry in " ".join(text.split()).split(";"))
    )
