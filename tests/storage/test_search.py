# ruff: noqa: RUF001 - letters that look like others are what is searched for
"""Search: the same words find the same on every database, the obvious one first, whatever a user types."""

import random
import unicodedata
from collections import defaultdict

import pytest
from sqlalchemy import insert, inspect, select, text

from dgx_music.errors import DatabaseUnavailableError, InvalidRequestError
from dgx_music.storage import Database, create_generation, search_generations, track_prompt_usage
from dgx_music.storage.labels import checked_labels
from dgx_music.storage.labels import label as store_labels
from dgx_music.storage.models import Generation, Prompt, text_hash
from dgx_music.storage.search import _ON_POSTGRESQL, _ON_SQLITE, _parse
from dgx_music.storage.words import search_text
from tests.factories import MODEL, back_date
from tests.storage.plans import analyze, plan_of

pytestmark = pytest.mark.any_driver

WORDS = """\
melancholic happy eerie calm energetic dreamy aggressive romantic nostalgic suspenseful uplifting raw
piano cello violin guitar flute trumpet synth organ accordion harp banjo saxophone sitar marimba
jazz techno folk metal reggae classical ambient house country blues disco samba gospel
cathedral club studio street festival cave room stadium forest market station"""
MOODS, INSTRUMENTS, GENRES, PLACES = (line.split() for line in WORDS.splitlines())
OBVIOUS = {
    "lofi rain": "lofi beat with soft rain on a window",
    "throat singing": "deep throat singing over horse hooves",
    "melancholic cello glacier": "melancholic cello above a melting glacier",
    "140 bpm trap": "dark trap beat, 140 BPM",
    "gospel": "gospel choir",
}


def captions(count):
    """Return texts like those people write: long, much alike, each word in many of them."""
    rng = random.Random(7)
    for number in range(count):
        mood, other = rng.sample(MOODS, 2)
        one, two, three = rng.sample(INSTRUMENTS, 3)
        yield (
            f"The low quality recording features a {mood} {rng.choice(GENRES)} song that consists of a {other} {one} melody,"
            f" a {two} solo and soft rain of {three} notes, played at {rng.randrange(60, 180)} bpm in a {rng.choice(PLACES)}."
            f" It sounds {mood}, like take {number} of a lofi beat and its singing trap drums."
        )


async def fill(database, texts):
    """Store a generation for each text, at once."""
    shape = {"model_name": MODEL, "duration_seconds": 8.0, "sample_rate": 32_000, "channels": 1}
    numbered = list(enumerate(texts, 1))
    prompts = [
        {"id": number, "text": prompt, "text_hash": text_hash(prompt)}
        for number, prompt in numbered
    ]
    async with database.session() as session:
        await session.execute(insert(Prompt), prompts)
        rows = [
            {"id": f"g-{number}", "prompt": prompt, "prompt_id": number} | shape
            for number, prompt in numbered
        ]
        await session.execute(insert(Generation), rows)
    await analyze(database)


async def ask_for(database, *prompts, **values):
    """Store a generation for each prompt, oldest first, and return their ids."""
    async with database.session() as session:
        made = [
            await create_generation(session, prompt, MODEL, 8.0, 32_000, 1) for prompt in prompts
        ]
        for generation in made:
            for name, value in values.items():
                setattr(generation, name, value)
        return [generation.id for generation in made]


async def found(database, words, **options):
    """Return the prompts found, best first."""
    async with database.session(read_only=True) as session:
        return [
            hit.generation.prompt for hit in await search_generations(session, words, **options)
        ]


# ranking, and what it costs


async def test_among_5000_captions_the_obvious_one_is_first(database):
    await fill(database, [*OBVIOUS.values(), *captions(5_000)])

    assert {words: (await found(database, words))[0] for words in OBVIOUS} == OBVIOUS


async def test_among_5000_captions_the_index_finds_them(database):
    await fill(database, [*captions(5_000), *OBVIOUS.values()])

    plan = await plan_of(
        database,
        lambda session: search_generations(session, "melancholic glacier", status="pending"),
    )

    words = (
        "prompts_search VIRTUAL TABLE INDEX"
        if database.is_embedded
        else "Index Scan on ix_prompts_text_search"
    )
    assert words in plan
    assert "ix_generations_prompt_id_created_at" in plan
    assert "Seq Scan" not in plan


async def test_a_prompt_used_10000_times_is_one_hit_by_its_newest_generation(database):
    await fill(database, ["lofi rain", "lofi rain at night in a city far away"])
    row = {
        "model_name": MODEL,
        "duration_seconds": 8.0,
        "sample_rate": 32_000,
        "channels": 1,
        "prompt_id": 1,
    }
    async with database.session() as session:
        rows = [{"id": f"new-{number:05}", "prompt": "lofi rain"} | row for number in range(10_000)]
        await session.execute(insert(Generation), rows)
        await back_date(session, "new-00500", created_at=-60)

    async with database.session(read_only=True) as session:
        first, second = await search_generations(session, "lofi rain")
    assert (first.generation.id, second.generation.id) == ("new-00500", "g-2")
    assert first.rank > second.rank


async def test_of_equally_good_prompts_the_one_used_last_is_first(database):
    await ask_for(database, "rain one", "rain two", "rain six")
    await ask_for(database, "rain two")

    async with database.session(read_only=True) as session:
        hits = await search_generations(session, "rain")
    assert [hit.generation.prompt for hit in hits] == ["rain two", "rain six", "rain one"]
    assert [hit.used_count for hit in hits] == [2, 1, 1]


# words


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        ("DRUM", "loud drums"),
        ("drums", "a drum"),
        ("chirping", "birds chirp"),
        ("cafe", "café noises"),
        ("CAFÉ", "cafe noises"),
        ("pop", "rock/pop"),
        ("rock/pop", "rock pop"),
        ("lo-fi", "lo fi beat"),
        ("90 bpm", "80-90bpm, or 90 bpm"),
        ("3.5", "3.5 minutes"),
        ("r&b", "R&B ballad"),
        ("don't stop", "don't ever stop"),
        ("the rain in the city", "city rain"),
        ('"rain in the city"', "soft rain in the city"),
        ('"the rain"', "rain"),
        ('"open quote', "an open quote"),
        ("rain or snow", "snow, rain"),
        ("rain AND NOT", "rain"),
        ("rain -snow", "rain"),
        ("rain - snow", "rain, snow"),
        ("音楽", "日本 音楽"),
    ],
)
async def test_words_find_the_prompt(database, words, prompt):
    await ask_for(database, prompt, "something else")

    assert await found(database, words) == [prompt]


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        ("rain snow", "rain"),
        ('"city rain"', "rain city"),
        ("rain -snow", "rain and snow"),
        ('rain -"in the city"', "rain in the city"),
        ("rain -snow -city", "rain in the city"),
        ("NEAR(rain city)", "rain city"),
        ("text:rain", "rain"),
        ("rai*", "rain"),
    ],
)
async def test_words_do_not_find_the_prompt(database, words, prompt):
    await ask_for(database, prompt)

    assert await found(database, words) == []


SCRIPTS = [
    ("тихий джаз", "тихий", "джас"),
    ("тихий джаз", "ТИХИИ", "тих"),
    ("ёлка и метель", "елка", "метели"),
    ("українська їжа", "їжа", "українська мова"),
    ("ήρεμη μουσική", "μουσική", "μουσικός"),
    ("ΗΡΕΜΟΣ ΗΧΟΣ", "ήρεμος ήχος", "ήχο"),
    ("잔잔한 피아노", "피아노", "피아니스트"),
    ("잔잔한 피아노", unicodedata.normalize("NFD", "피아노"), "피"),
    ("शांत संगीत", "संगीत", "संगति"),
    ("मीठी धुन", "मीठी", "मठ"),
    ("இனிய இசை", "இசை", "இச"),
    ("ﬁddle tune", "fiddle", "iddle"),
    ("a fiddle", "ﬁddle", "ﬂute"),
    ("Ｌｏｆｉ ｂｅａｔ", "lofi", "lo"),
    ("lofi beat", "Ｌｏｆｉ", "ｌｏ"),
    ("静かなギターの曲", "ギター", "キター"),
    ("静かなギターの曲", "ｷﾞﾀｰ", "ピアノ"),
    ("がっこう の うた", "がっこう", "かっこう"),
    ("がっこう の うた", unicodedata.normalize("NFD", "がっこう"), "がこう"),
    ("安静的钢琴音乐", "钢琴", "琴钢"),
    ("เพลงไทยเดิม", "ไทย", "ไทม"),
    ("موسيقى هادئة", "مُوسيقى", "موسيق"),
    ("שיר שקט", "שִׁיר", "שירה"),
    ("große Straße", "STRASSE", "strase"),
    ("İstanbul sazı", "istanbul", "stanbul"),
    ("Dvořák’s çello, naïve", "dvorak cello naive", "dvo"),
    ("nhạc Việt Nam", "nhac viet", "nha"),
    ("½ tempo, 80s, m²", "80s m2", "80 m2"),
    ("1e5 or 0x1F at 12abc", "1E5 0x1f 12abc", "abc"),
    ("٣ طبول", "٣", "3x"),
    ("𝓭𝓻𝓮𝓪𝓶𝔂 🎻 solo", "dreamy", "🎻 dream𝔂x"),
    ("xd182 is no т", "xd182 т", "xd1820"),
]


@pytest.mark.parametrize(("prompt", "words", "wrong"), SCRIPTS)
async def test_a_word_is_found_in_any_script(database, prompt, words, wrong):
    await ask_for(database, *{prompt for prompt, _, _ in SCRIPTS})

    assert prompt in await found(database, words)
    assert prompt not in await found(database, wrong)
    assert prompt in await found(database, f'"{prompt}"')


@pytest.mark.parametrize(
    "part",
    [
        "a",
        "я",
        "9",
        "é9",
        "한",
        "ﬃ",
        "я ",
        "".join(map(chr, range(0x4E00, 0x4E40))),
        "".join(map(chr, range(0xE01, 0xE2F))),
    ],
)
async def test_a_prompt_and_a_search_of_2000_characters_are_no_trouble(database, part):
    longest = (part * 2_000)[:2_000].strip()
    await ask_for(database, longest, "something else")

    assert await found(database, longest) == [longest]


def characters(rng):
    """Return some text of any of Unicode's characters, neighbours in it mostly."""
    first = rng.choice(
        [
            0x20,
            0xA0,
            0x370,
            0x590,
            0x900,
            0xE00,
            0x1100,
            0x1E00,
            0x2000,
            0x3000,
            0x4E00,
            0xAC00,
            0xFB00,
        ]
    )
    codes = [
        first + rng.randrange(256) if rng.random() < 0.9 else rng.randrange(32, 0xD800)
        for _ in range(40)
    ]
    return "".join(map(chr, [*codes, rng.randrange(0x1_0000, 0x3_0000)]))


async def test_both_databases_split_the_text_at_its_spaces_and_nowhere_else(database):
    rng = random.Random(11)
    texts = [
        *{f"w {characters(rng)}" for _ in range(500)},
        *["1e5 80s -7 3.5 a/b a_b a.b.com x@y.z &amp; <b> 0x1f"],
    ]
    await fill(database, texts)

    async with database.session() as session:
        kept = dict((await session.execute(select(Prompt.id, Prompt.search_text))).all())
        if database.is_embedded:
            vocabulary = "CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab(main, prompts_search, instance)"
            await session.execute(text(vocabulary))
            read = "SELECT doc, term FROM temp.vocabulary ORDER BY doc, offset"
        else:
            read = (
                "SELECT id, token FROM prompts, ts_parse('default', search_text) WHERE tokid <> 12"
            )
        tokens = defaultdict(list)
        for number, token in (await session.execute(text(read))).all():
            tokens[number].append(token)
    for number, words in kept.items():
        assert words == search_text(texts[number - 1])
        assert len(tokens[number]) == len(words.split())
        for token, word in zip(tokens[number], words.split(), strict=True):
            assert token == word or word.isalpha()  # which is stemmed


async def test_a_prompts_words_are_written_but_not_read(database):
    async with database.session() as session:
        prompt = await track_prompt_usage(session, "тихий джаз")
        assert "search_text" in inspect(prompt).unloaded
        assert "search_text" not in prompt.to_dict()


@pytest.mark.parametrize(
    "operator",
    ["(rain", "rain)", "^rain", "rain:*", "rain & !", "{rain}", "rain \\", "+rain", "%rain"],
)
async def test_operators_of_either_database_mean_nothing(database, operator):
    await ask_for(database, "rain")

    assert await found(database, operator) == ["rain"]


@pytest.mark.parametrize("one", ["w{}", "-w{}", '"w{} x"', '-"w{} x"'])
async def test_hundreds_of_words_are_no_trouble(database, one):
    await ask_for(database, "rain")
    many = " ".join(one.format(number) for number in range(200))

    assert await found(database, f"rain {many}") == (["rain"] if one.startswith("-") else [])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("  ", "words is empty; give at least one word to look for."),
        ("x" * 10_000, "words has 10,000 characters; use at most 2,000."),
        ("a\0b", "words has the control character U+0000; use printable characters."),
        (
            "\ud800",
            "words has a lone surrogate, which is not a character; send well-formed Unicode.",
        ),
        (None, "words is missing; use text."),
        (
            "\u0301",
            "words has no character that can be seen on its own; give at least one word to look for.",
        ),
        ("-rain", "words only says what to leave out; add one, and not one as frequent as 'the'."),
        *(
            (words, "words has no word to look for; add one")
            for words in ('"', '""', "!?", "-", "* & |", "the")
        ),
    ],
)
async def test_words_that_cannot_be_looked_for_are_refused_in_a_sentence(database, words, sentence):
    with pytest.raises(InvalidRequestError) as refused:
        await found(database, words)
    assert str(refused.value).startswith(sentence)


async def test_a_database_that_cannot_hold_every_character_is_refused(postgres):
    locale = "ENCODING 'SQL_ASCII' LOCALE 'C' LOCALE_PROVIDER libc TEMPLATE template0"
    postgres.execute(f"CREATE DATABASE search_ascii {locale}")
    database = Database(postgres.url("search_ascii"))

    with pytest.raises(
        DatabaseUnavailableError, match="its encoding is SQL_ASCII; create it with: CREATE DATABASE"
    ):
        await database.migrate()
    await database.dispose()
    postgres.drop_database("search_ascii")


# filters


@pytest.mark.parametrize(
    "filters",
    [
        {"status": "failed"},
        {"model": "musicgen-large"},
        {"tenant": "acme"},
        {"created_before": "2001-01-01T00:00:00Z"},
        {
            "tenant": "acme",
            "status": "pending",
            "model": MODEL,
            "created_from": "2001-01-01T00:00:00Z",
        },
    ],
)
async def test_a_filter_that_no_generation_of_the_prompt_fits_hides_it(database, filters):
    await ask_for(database, "lofi rain")

    assert await found(database, "rain", **filters) == []


async def test_a_hit_shows_the_newest_generation_that_fits(database):
    (failed,) = await ask_for(database, "rain", tenant="acme")
    await ask_for(database, "rain", tenant="other")
    await ask_for(database, "rain")

    async with database.session(read_only=True) as session:
        (hit,) = await search_generations(session, "rain", tenant="acme")
        assert hit.generation.id == failed
        (hit,) = await search_generations(session, "rain", tenant="")
        assert hit.generation.tenant == ""


async def test_the_limit_counts_prompts_that_have_a_generation(database):
    await fill(database, ["rain one", "rain two", "rain six"])
    async with database.session() as session:
        await session.delete(await session.get_one(Generation, "g-3"))

    assert await found(database, "rain", limit=1) == ["rain two"]
    assert await found(database, "rain", limit=0) == []


async def test_a_changed_prompt_is_found_by_its_new_words_only(database):
    await ask_for(database, "lofi rain")
    async with database.session() as session:
        (await session.get_one(Prompt, 1)).text = "lofi snow"

    assert await found(database, "rain") == []
    assert await found(database, "snow") == ["lofi rain"]


# titles, notes and tags


async def label(database, generation_id, **labels):
    await database.transact(
        lambda session: store_labels(session, generation_id, checked_labels(labels))
    )


async def hits(database, words, **options):
    """Return the ids found, best first."""
    async with database.session(read_only=True) as session:
        return [hit.generation.id for hit in await search_generations(session, words, **options)]


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        ("drum", {"title": "Drums at night"}),
        ("cafe", {"notes": "for the\ncafé scene"}),
        ("ambient", {"tags": ["warm", "ambient"]}),
        ("night warm", {"title": "night", "tags": ["warm"]}),
        ('"café scene" -vocals', {"notes": "the cafe scene"}),
        ("тихий", {"title": "тихий час"}),
        ("安静", {"tags": ["安静的"]}),
    ],
)
async def test_words_of_title_notes_and_tags_find_the_generation(database, words, labels):
    one, _ = await ask_for(database, "something", "something")
    await label(database, one, **labels)

    assert await hits(database, words) == [one]


@pytest.mark.parametrize("words", ["night rain", "-warm drive", '"drive night"', "dri"])
async def test_words_that_are_not_all_in_the_labels_do_not_find_it(database, words):
    (one,) = await ask_for(database, "rain")
    await label(database, one, title="night drive", tags=["warm"])

    assert await hits(database, words) == []


async def test_a_generation_found_by_its_labels_and_by_its_prompt_is_one_hit(database):
    first, other = await ask_for(database, "rain", "snow")
    await label(database, first, title="rain", notes="more rain", tags=["rain"])

    assert await hits(database, "rain") == [first]
    await label(database, other, title="Rain song")
    assert {*await hits(database, "rain")} == {first, other}


async def test_an_older_take_with_a_title_is_a_hit_beside_the_newest_of_its_prompt(database):
    older, _, newest = await ask_for(database, "rain", "rain", "rain")
    await label(database, older, title="rain")

    assert await hits(database, "rain") == [older, newest]


async def test_the_best_labels_and_the_best_prompt_have_rank_1(database):
    await ask_for(database, "rain", "soft rain on a long road by the sea")
    (titled,) = await ask_for(database, "snow")
    await label(database, titled, title="a rain that falls all night and all day")

    async with database.session(read_only=True) as session:
        found = await search_generations(session, "rain")
    assert [hit.rank for hit in found][:2] == [1, 1]
    assert found[2].rank < 1
    assert found[0].generation.id == titled


async def test_changed_and_deleted_labels_are_not_found_by_their_old_words(database):
    one, other = await ask_for(database, "snow", "snow")
    await label(database, one, title="rain")
    await label(database, one, title="hail")
    await label(database, other, title="rain")
    async with database.session() as session:
        await session.delete(await session.get_one(Generation, other))

    assert await hits(database, "rain") == []
    assert await hits(database, "hail") == [one]


async def test_filters_and_the_limit_count_for_labels(database):
    made = await ask_for(database, *["snow"] * 5)
    for generation_id in made:
        await label(database, generation_id, title="rain")
    await label(database, made[0], starred=True, tags=["keep"])

    assert await hits(database, "rain", limit=2) == made[:2:-1]
    assert await hits(database, "rain", starred=True, tag="keep") == [made[0]]
    assert await hits(database, "rain", status="failed") == []


@pytest.mark.parametrize("part", ["a", "я", "ﬃ", "я ", "".join(map(chr, range(0x4E00, 0x4E40)))])
async def test_notes_of_10000_characters_are_no_trouble(database, part):
    (one,) = await ask_for(database, "snow")
    await label(database, one, notes=(part * 9_995)[:9_995] + " rain")

    assert await hits(database, "rain") == [one]


async def test_among_5000_notes_the_index_finds_them(database):
    rows = [
        {"id": f"t-{number}", "notes": text, "search_text": search_text(text), "prompt": ""}
        | {"model_name": MODEL, "duration_seconds": 8.0, "sample_rate": 32_000, "channels": 1}
        for number, text in enumerate([*captions(5_000), *OBVIOUS.values()])
    ]
    async with database.session() as session:
        await session.execute(insert(Generation), rows)
    await analyze(database)

    find = (_ON_SQLITE if database.is_embedded else _ON_POSTGRESQL)[0]
    query = find(_parse("melancholic glacier"), {"status": "pending"}).limit(20)
    plan = await plan_of(database, lambda session: session.execute(query))

    words = (
        "generations_search VIRTUAL TABLE INDEX"
        if database.is_embedded
        else "ix_generations_text_search"
    )
    assert words in plan
    assert "Seq Scan on generations" not in plan
    assert await hits(database, "melancholic glacier") == ["t-5002"]
