"""The report as a file (self-contained, hostile text inert) and in a real browser."""

import dataclasses
import html
import html.parser
import json
import re

import pytest

from infalign.errors import InputError, StorageError
from infalign.evaluation.compare import compare
from infalign.report import curves, figures
from infalign.report.markdown import render_markdown
from infalign.report.page import ReportData, write_report
from infalign.report.words import percent, worse_sentence
from tests.report.browser import needs_browser, opened
from tests.report.example import HOSTILE, candidate, method, report_data, sweep, two_methods


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("report") / "sub" / "report.html", report_data())


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes, as a browser would open them."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


class TestFile:
    def test_names_no_outside_resource(self, page):
        for tag, attributes in Tags(page.read_text()).found:
            assert "src" not in attributes, tag
            href = attributes.get("href", "#")
            assert href.startswith("#") or (tag, href) == ("link", "data:,")
        assert "default-src 'none'" in page.read_text()

    def test_hostile_text_is_never_markup(self, page):
        text = page.read_text()
        tags = [tag for tag, _ in Tags(text).found]
        assert "img" not in tags
        assert "b" not in tags
        assert "<img" not in re.sub(r"(?s)<script>.*?</script>", "", text)
        assert "{{ 7*7 }}" in text  # not run as a template either

    def test_every_section_has_a_heading_and_every_control_a_label(self, page):
        found = Tags(page.read_text()).found
        ids = [attributes["id"] for _, attributes in found if "id" in attributes]
        assert len(ids) == len(set(ids))
        labelled = {attributes["for"] for tag, attributes in found if tag == "label"}
        for tag, attributes in found:
            if tag in ("select", "input"):
                assert attributes["id"] in labelled
            for reference in ("aria-labelledby", "aria-describedby"):
                assert attributes.get(reference, ids[0]) in ids
            if attributes.get("href", "").startswith("#"):
                assert attributes["href"][1:] in ids
            if attributes.get("role") == "img":
                assert attributes["aria-label"]
        assert [tag for tag, _ in found].count("h1") == 1

    def test_says_what_was_found(self, page):
        text = page.read_text()
        aware, plain = two_methods()
        assert "With Best-of-4, aware beats the reference used the same way" in text
        assert compare([aware, plain], baseline="plain")[2].sentence in text
        assert "Judged by other rewards" in text
        assert percent(aware.of("Best-of-4").judged["gold"]) in text
        assert f"{100 * aware.of('Best-of-4').win_rate.estimate:.1f}%" in text

    def test_says_what_the_mean_may_hide(self, page, tmp_path):
        text = page.read_text()
        assert worse_sentence(two_methods()[0]) in text
        warned = write_report(tmp_path / "a.html", report_data(warnings=[f"mind {HOSTILE}"])).read_text()
        assert "mind &lt;/script&gt;" in warned
        assert "img" not in [tag for tag, _ in Tags(warned).found]

    def test_a_sweep_is_one_curve_by_both_rewards(self, tmp_path):
        data = ReportData(sweep(), "Best-of-4")
        text = write_report(tmp_path / "a.html", data).read_text()
        assert "from the reference on. Solid: judged by reward" in text
        look = figures.styles_of(data.results)
        assert len({look[f"a step {step}"] for step in (10, 20, 40)}) == 1
        figure = curves.over_kl_figure(data.results, "Best-of-4", look, ["gold"])
        assert [(trace["name"], len(trace["x"])) for trace in figure["data"]] == [
            ("a, by reward", 4),
            ("a, by gold", 4),
        ]
        assert [trace["y"][0] for trace in figure["data"]] == [0.5, 0.5]
        over_n = curves.win_rate_over_n_figure(data.results, "best-of-n", look)
        assert [trace["name"] for trace in over_n["data"] if "name" in trace] == ["a step 40", "b"]

    def test_markdown_says_the_same(self):
        text = render_markdown(report_data())
        aware, plain = two_methods()
        assert "With Best-of-4, aware beats the reference used the same way" in text
        assert percent(aware.of("Best-of-4").judged["gold"]) in text
        assert worse_sentence(plain) in text
        assert "<img" not in text.replace("\\<", "")

    def test_two_writes_are_equal(self, page, tmp_path):
        assert write_report(tmp_path / "again.html", report_data()).read_bytes() == page.read_bytes()

    def test_little_is_enough(self, tmp_path):
        text = write_report(tmp_path / "a.html", ReportData([two_methods()[0]], "Best-of-4")).read_text()
        for absent in ("sample-form", 'id="training"', 'id="rewards"'):
            assert absent not in re.sub(r"(?s)<(script|style)>.*?</\1>", "", text)

    def test_one_prompt_has_no_interval_and_says_so(self, tmp_path):
        text = write_report(tmp_path / "a.html", ReportData([method("a", 0.5, num_prompts=1)], "Standard")).read_text()
        assert "no interval" in text

    def test_samples_are_cut_to_size_and_counted(self, tmp_path):
        big = [
            {"prompt": "p", "methods": {"aware": {"candidates": [candidate("y" * 1_000_000, 0.0, chosen=True)]}}}
            for _ in range(9)
        ]
        path = write_report(tmp_path / "a.html", report_data(samples=big))
        assert path.stat().st_size < 10_000_000
        assert "7 more prompts were left out" in path.read_text()

    def test_from_stored_json(self, tmp_path):
        data = report_data()
        stored = {**dataclasses.asdict(data), "results": [result.to_dict() for result in data.results]}
        again = ReportData.from_dict(json.loads(json.dumps(stored)))
        assert (
            write_report(tmp_path / "b.html", again).read_bytes()
            == write_report(tmp_path / "a.html", data).read_bytes()
        )
        with pytest.raises(InputError, match="not the data of a report"):
            ReportData.from_dict({"procedure": "Best-of-4"})

    def test_refusals(self, tmp_path):
        with pytest.raises(InputError, match="no result"):
            write_report(tmp_path / "a.html", report_data(results=[]))
        with pytest.raises(InputError, match="not measured under Best-of-64"):
            write_report(tmp_path / "a.html", report_data(procedure="Best-of-64"))
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="cannot be written"):
            write_report(tmp_path / "file" / "a.html", report_data())


@needs_browser
class TestBrowser:
    def test_draws_everything_quietly_and_asks_for_nothing(self, page, tmp_path):
        dom, console = opened(page, tmp_path)
        assert 'data-ready="true"' in dom
        assert console == []
        places = dom.count("data-figure=")
        assert places == 8  # frontier, two over N, the same by another reward, training, two of rewards
        assert dom.count('class="main-svg"') >= places
        assert "errorbars" in dom

    def test_a_request_would_be_blocked_and_seen(self, page, tmp_path):
        # The quiet console above means something: the page's own policy stops a request, and the browser says so.
        _, console = opened(page, tmp_path, 'fetch("https://example.invalid/").catch(() => {});')
        assert any("Content Security Policy" in line for line in console)

    def test_hostile_text_is_shown_as_text(self, page, tmp_path):
        # Probe what a reader would see: text content, not markup.
        script = """addEventListener("load", () => setTimeout(() => {
          const seen = [...document.querySelectorAll(".text")].map((node) => node.textContent);
          document.body.dataset.probe = JSON.stringify({
            hostile: seen.filter((text) => text.includes("<\\/script><img src=x onerror=")).length,
            marks: seen.some((text) => text.includes("⟨U+202E⟩right to left")),
            longest: Math.max(...seen.map((text) => text.length)),
            images: document.querySelectorAll("img").length,
            title: document.title.startsWith("Title <\\/script>"),
            wide: document.documentElement.scrollWidth <= innerWidth,
          });
        }, 500));"""
        dom, console = opened(page, tmp_path, script)
        probe = json.loads(html.unescape(re.search(r'data-probe="([^"]*)"', dom)[1]))
        assert console == []
        assert probe == {"hostile": 2, "marks": True, "longest": 100_000, "images": 0, "title": True, "wide": True}

    def test_search_filters_theme_and_choice_work(self, page, tmp_path):
        script = """addEventListener("load", () => setTimeout(() => {
          const at = (id) => document.getElementById(id);
          const count = () => at("sample-count").textContent;
          const set = (id, value) => {
            at(id).value = value;
            at(id).dispatchEvent(new Event(id === "frontier-choice" ? "change" : "input", { bubbles: true }));
          };
          const seen = { all: count() };
          at("sample-more").click();
          seen.more = count();
          set("sample-search", "NEEDLE 7");
          seen.search = count();
          set("sample-search", "");
          set("sample-outcome", "loss");
          seen.loss = count();
          set("sample-method", "plain");
          seen.plain = count();
          set("sample-outcome", "tie");
          seen.tie = count();
          set("sample-outcome", "");
          set("sample-method", "aware");
          set("sample-quantile", "2");
          seen.quarter = count();
          set("sample-quantile", "0");
          seen.lowest = count();
          set("sample-quantile", "");
          set("sample-order", "worst");
          seen.worst = document.querySelector(".sample h3").textContent;
          const details = document.querySelector(".sample details");
          details.open = true;
          set("frontier-choice", "frontier:Worst-of-4");
          at("theme").click(); at("theme").click();
          setTimeout(() => {
            seen.candidates = details.querySelectorAll(".candidate").length;
            seen.axis = at("frontier-plot").querySelector(".ytitle").textContent;
            seen.paper = getComputedStyle(document.body).backgroundColor;
            document.body.dataset.probe = JSON.stringify(seen);
          }, 1000);
        }, 500));"""
        dom, console = opened(page, tmp_path, script)
        seen = json.loads(html.unescape(re.search(r'data-probe="([^"]*)"', dom)[1]))
        assert console == []
        assert seen == {
            "all": "30 of 30 prompts match; 8 shown.",
            "more": "30 of 30 prompts match; 16 shown.",
            "search": "1 of 30 prompts match; 1 shown.",
            "loss": "10 of 30 prompts match; 8 shown.",
            "plain": "0 of 30 prompts match; 0 shown.",
            "tie": "30 of 30 prompts match; 8 shown.",
            "quarter": "20 of 30 prompts match; 8 shown.",
            "lowest": "0 of 30 prompts match; 0 shown.",
            "worst": "Prompt 1",
            "candidates": 2,
            "axis": "Worst-of-4 win rate",
            "paper": "rgb(20, 23, 28)",
        }

    def test_fifty_runs_stay_small_and_draw(self, tmp_path):
        runs = [dataclasses.replace(two_methods()[0], label=f"run {i}") for i in range(50)]
        path = write_report(tmp_path / "fifty.html", ReportData(runs, "Best-of-4", baseline="run 0"))
        assert path.stat().st_size < 10_000_000
        dom, console = opened(path, tmp_path)
        assert 'data-ready="true"' in dom
        assert console == []
