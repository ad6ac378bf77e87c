"""A Streamlit page that runs anew with every click, and makes its wrapper anew each time."""

from __future__ import annotations

import gc
import threading

import pytest

from tests.extras import needs
from tests.helpers import PATIENCE

pytestmark = needs("streamlit", target="runtimes")

PAGE = """
import streamlit as st
from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings.testing import ScriptedEmbeddings

question = st.text_input("Question")
if CACHED:
    make = st.cache_resource(lambda: PrefetchingEmbeddings(ScriptedEmbeddings()))
else:
    make = lambda: PrefetchingEmbeddings(ScriptedEmbeddings())
embeddings = make()
if question:
    embeddings.prefetch(question)
    assert embeddings.wait_for_prefetch(question, 20)
    st.text(str(len(embeddings.embed_query(question))))
"""


@pytest.mark.timeout(180)
@pytest.mark.filterwarnings("ignore")  # Streamlit's own
@pytest.mark.parametrize("cached", [False, True])
def test_reruns_leave_no_threads(cached: bool) -> None:
    from streamlit.testing.v1 import AppTest

    before = set(threading.enumerate())
    page = AppTest.from_string(PAGE.replace("CACHED", str(cached)), default_timeout=PATIENCE).run()
    for number in range(10):
        page.text_input[0].set_value(f"question {number}").run()
        assert not page.exception
        assert page.text[0].value == "8"
    del page
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("prefetch-embeddings"):
            thread.join(2 * PATIENCE)
            assert not thread.is_alive(), thread.name
