"""Tasks in memory: one entry each, under a limit of characters, and none that was removed."""

from manyicl.serving.backends import TaskSpec
from manyicl.serving.spec_cache import SpecCache
from manyicl.tasks.task import Example


def spec_of(key: str, count: int = 1, size: int = 100) -> TaskSpec:
    return TaskSpec(key, tuple(Example(f"{number}".ljust(size, "x"), "") for number in range(count)), ("a", "b"), "Do it.")


def test_a_task_that_grew_takes_the_place_of_what_it_was() -> None:
    cache = SpecCache(10**6)
    old, new = spec_of("a", 2), spec_of("a", 3)
    moment = cache.find("a", 2)[1]
    cache.hold(old, moment)
    assert cache.find("a", 2)[0] is old
    assert cache.find("a", 3)[0] is None
    cache.hold(new, moment)
    assert cache.find("a", 3)[0] is new
    assert cache.find("a", 2)[0] == old
    cache.hold(old, moment)  # Read late, by a request that began before.
    assert cache.find("a", 3)[0] is new
    assert (len(cache), cache.num_characters) == (1, 3 * 300)


def test_those_used_longest_ago_go_when_there_are_too_many_characters() -> None:
    cache = SpecCache(900)
    for key in "abc":
        cache.hold(spec_of(key), 0)
    assert cache.find("a", 1)[0] is not None
    cache.hold(spec_of("d"), 0)
    assert [key for key in "abcd" if cache.find(key, 1)[0]] == ["a", "c", "d"]
    cache.hold(spec_of("e", size=5000), 0)
    assert [key for key in "abcde" if cache.find(key, 1)[0]] == ["e"]
    assert cache.num_characters == 5200
    cache.hold(spec_of("f"), 0)
    assert ([key for key in "abcdef" if cache.find(key, 1)[0]], cache.num_characters) == (["f"], 300)


def test_a_task_that_was_removed_while_it_was_read_is_not_held() -> None:
    cache = SpecCache(10**6)
    cache.hold(spec_of("a"), 0)
    moment = cache.find("b", 1)[1]
    cache.remove("a")
    assert (cache.find("a", 1)[0], cache.num_characters) == (None, 0)
    cache.hold(spec_of("b"), moment)
    assert cache.find("b", 1)[0] is None
    moment = cache.find("b", 1)[1]
    cache.hold(spec_of("b"), moment)
    assert cache.find("b", 1)[0] == spec_of("b")
