"""Make the four task files in `examples/`: a format, a label with choices, and a short text, with one task to hold out.

    python scripts/examples.py examples

The same seed gives the same bytes. `tests/scripts/test_examples.py` holds the shipped files to this script. To make a
task of your own, write one JSON object a line, as `write` does.
"""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

Rows = list[dict[str, object]]

SPLITS = {"train": 110, "validation": 20, "test": 40}

MONTHS = """
January February March April May June July August September October November December
"""

MOODS = {
    "happy": [
        "I could not stop smiling",
        "I laughed all the way home",
        "it was the best news of the year",
        "I danced around the kitchen",
        "I felt lucky to be there",
        "everything went better than I had hoped",
        "I was so proud of us",
        "I hugged everybody I met",
    ],
    "sad": [
        "I was close to tears",
        "I missed her more than ever",
        "I did not want to talk to anybody",
        "I felt so alone",
        "it broke my heart",
        "I cried for an hour",
        "nothing could cheer me up",
        "I wished that he were still here",
    ],
    "angry": [
        "I slammed the door",
        "I shouted at the driver",
        "I have had enough of their excuses",
        "I want my money back at once",
        "I could have thrown the phone at the wall",
        "nobody even said sorry, and I was furious",
        "I will never shop there again",
        "how dare they treat us like that",
    ],
}
SCENES = [
    "When the letter came,",
    "After the meeting,",
    "On the train this morning,",
    "When I saw the photographs,",
    "At the end of the film,",
    "When they called my name,",
    "Last night at dinner,",
    "After three weeks of waiting,",
    "When I opened the box,",
    "On my birthday,",
    "As soon as I read the message,",
    "When we came back to the hotel,",
]

# Where English asks for more than an s, the whole form is given after a slash.
NOUNS = """
apple arm army/armies baby/babies bag ball bank bear bed bee bell bench/benches berry/berries bike bird boat bone book
boot bottle box/boxes boy branch/branches bridge brush/brushes bus/buses bush/bushes butterfly/butterflies button cake
calf/calves camel camp candle car card carrot castle cat chair cherry/cherries child/children church/churches
city/cities class/classes clock cloud coat copy/copies country/countries cow crab crown cup day deer/deer desk
dish/dishes doctor dog door dress/dresses drum duck eagle ear echo/echoes egg elf/elves eye face factory/factories
fairy/fairies family/families farm fence field finger fish/fish flag flower fly/flies foot/feet forest fork fox/foxes
friend frog garden ghost girl glass/glasses goat goose/geese half/halves hand hat hero/heroes hill horn horse house
island jar key kite kitten knee knife/knives lady/ladies lake lamp leaf/leaves leg lemon letter library/libraries
life/lives lion loaf/loaves man/men map market match/matches mirror monkey month mountain mouse/mice mouth nest net
night nose nut ocean onion orange owl ox/oxen page painting parrot party/parties peach/peaches pen penny/pennies
picture pig pilot plate pocket pony/ponies potato/potatoes prize puppy/puppies queen rabbit ring river road robot roof
room root rose scarf/scarves school sea sheep/sheep shelf/shelves ship shirt shoe shop sister snake sock song spider
spoon star stone story/stories street student table tail teacher thief/thieves ticket tiger tomato/tomatoes
tooth/teeth tower town toy train tree uncle valley village violin voice wall watch/watches wave week wheel whistle
wife/wives window wing wish/wishes witch/witches wolf/wolves woman/women word worm year zebra
"""

VERBS = """
add/added agree/agreed answer/answered arrive/arrived ask/asked bake/baked become/became begin/began believe/believed
bend/bent bite/bit blow/blew borrow/borrowed break/broke bring/brought build/built burn/burned buy/bought call/called
carry/carried catch/caught change/changed choose/chose clean/cleaned climb/climbed close/closed collect/collected
come/came cook/cooked copy/copied count/counted cover/covered cross/crossed cry/cried dance/danced decide/decided
dig/dug draw/drew dream/dreamed drink/drank drive/drove drop/dropped eat/ate enjoy/enjoyed explain/explained fall/fell
feed/fed feel/felt fight/fought fill/filled find/found finish/finished fly/flew follow/followed forget/forgot
forgive/forgave freeze/froze give/gave go/went grow/grew guess/guessed hang/hung hear/heard help/helped hide/hid
hold/held hope/hoped hug/hugged hunt/hunted hurry/hurried invite/invited join/joined jump/jumped keep/kept kick/kicked
knock/knocked know/knew laugh/laughed learn/learned leave/left lend/lent lift/lifted like/liked listen/listened
live/lived look/looked lose/lost love/loved make/made marry/married mean/meant meet/met miss/missed move/moved
need/needed notice/noticed offer/offered open/opened order/ordered paint/painted pass/passed pay/paid plan/planned
plant/planted play/played point/pointed pray/prayed prefer/preferred print/printed promise/promised pull/pulled
push/pushed reach/reached remember/remembered repair/repaired reply/replied rest/rested return/returned ride/rode
ring/rang rise/rose run/ran save/saved say/said see/saw sell/sold send/sent shake/shook shout/shouted sing/sang
sink/sank sit/sat sleep/slept smile/smiled speak/spoke spend/spent stand/stood start/started stay/stayed steal/stole
stop/stopped study/studied swim/swam take/took talk/talked taste/tasted teach/taught tear/tore tell/told thank/thanked
think/thought throw/threw touch/touched travel/travelled try/tried turn/turned type/typed use/used visit/visited
wait/waited wake/woke walk/walked want/wanted wash/washed watch/watched wear/wore win/won wish/wished work/worked
worry/worried write/wrote
"""


def dates(draw: random.Random) -> Rows:
    """A format: a date in words, in one of five ways to write it, becomes year-month-day."""
    found: Rows = []
    for _ in range(4 * sum(SPLITS.values())):
        year, month, day = draw.randint(1950, 2029), draw.randint(1, 12), draw.randint(1, 28)
        name, ending = (
            MONTHS.split()[month - 1],
            {1: "st", 2: "nd", 3: "rd"}.get(day % 10 if day // 10 != 1 else 0, "th"),
        )
        wording = draw.choice(
            [
                f"the {day}{ending} of {name} {year}",
                f"{name} {day}, {year}",
                f"{day} {name} {year}",
                f"{name} the {day}{ending}, {year}",
                f"{day} {name[:3]} {year}",
            ]
        )
        found.append({"input": wording, "target": f"{year}-{month:02}-{day:02}"})
    return found


def mood(draw: random.Random) -> Rows:
    """A label with choices: how the writer of a sentence or two felt."""
    found: Rows = []
    for label, reactions in MOODS.items():
        for reaction in reactions:
            for scene in SCENES:
                found.append({"input": f"{scene} {reaction}. I felt", "target": label, "choices": list(MOODS)})
    draw.shuffle(found)
    return found


def plural(draw: random.Random) -> Rows:
    """A short text: the plural of a noun."""
    found: Rows = []
    for noun, several in _forms(NOUNS, "s"):
        one = "an" if noun[0] in "aeiou" else "a"
        wording = draw.choice([f"one {noun}, many", f"{one} {noun}, two", f"this {noun}, these"])
        found.append({"input": wording, "target": several})
    draw.shuffle(found)
    return found


def past(draw: random.Random) -> Rows:
    """To hold out: the past of a verb, which is new to experts of the other three tasks."""
    found: Rows = []
    for verb, then in _forms(VERBS, ""):
        who = draw.choice(["I", "we", "they"])
        found.append({"input": f"today {who} {verb}, yesterday {who}", "target": then})
    draw.shuffle(found)
    return found


TASKS = (dates, mood, plural, past)


def write(folder: Path, seed: int = 0) -> None:
    """Write each task's file, with as many rows of each split as `SPLITS` says; no input comes twice."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        rows = {str(row["input"]): row for row in task(random.Random(f"{task.__name__}/{seed}"))}
        splits = [split for split, count in SPLITS.items() for _ in range(count)]
        chosen = list(rows.values())[: len(splits)]
        assert len(chosen) == len(splits), f"{task.__name__} has {len(chosen)} rows"
        lines = [json.dumps({**row, "split": split}) for row, split in zip(chosen, splits, strict=True)]
        (folder / f"{task.__name__}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _forms(words: str, regular: str) -> Iterable[tuple[str, str]]:
    for word in words.split():
        first, _, second = word.partition("/")
        yield first, second or first + regular


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "examples"))
