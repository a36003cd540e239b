"""What tools of the server said before a call of the client's, for when it comes back."""

from server_fakes import ASKED

from openelm_mlx.server.exchanges import Exchange, Exchanges
from openelm_mlx.text.conversation import Message


def test_only_who_has_the_whole_chat_gets_what_its_tools_said():
    exchanges = Exchanges()
    ours = [Message("assistant", "Hm.", channel="analysis"), Message("tool", "secret", "python")]
    theirs = {"role": "assistant", "reasoning": "Hm.\n\n[ran]\n[= sec …]\n\nThen.", "tool_calls": ["theirs"]}
    exchanges.keep(ASKED, Exchange("Hm.[ran]\n[= sec …]Then.", ours))
    assert exchanges.completed([*ASKED, theirs]) == [*ASKED, *ours, {**theirs, "reasoning": None, "content": None}]
    for other in (
        [{"role": "user", "content": "Another question."}, theirs],
        [*ASKED, {**theirs, "reasoning": "[ran]\n[= sec …]"}],
        [*ASKED, {key: value for key, value in theirs.items() if key != "reasoning"}],
        [*ASKED, {**theirs, "tool_calls": []}],
        [*ASKED, {"role": "user", "content": "Go on."}, theirs],
    ):
        assert exchanges.completed(other) == other


def test_only_the_latest_are_remembered():
    exchanges = Exchanges(most=3, most_bytes=1000)
    chats = [[{"role": "user", "content": str(number)}] for number in range(6)]
    theirs = {"role": "assistant", "reasoning": "x", "tool_calls": ["theirs"]}

    def is_known(before):
        return len(exchanges.completed([*before, theirs])) > 2

    for each in chats[:4]:
        exchanges.keep(each, Exchange("x", [Message("tool", "a", "python")]))
    assert [is_known(each) for each in chats[:4]] == [False, True, True, True]
    exchanges.keep(chats[4], Exchange("x", [Message("tool", "a" * 997, "python")]))
    assert [is_known(each) for each in chats[:5]] == [False, False, False, True, True]
    exchanges.keep(chats[5], Exchange("x", [Message("tool", "a" * 1000, "python")]))  # larger than all of them
    assert not is_known(chats[5])
    assert (len(exchanges), exchanges.num_bytes <= 1000) == (2, True)
