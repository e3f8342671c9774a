"""Takes the chat page's two pictures, docs/web_demo.png and docs/web_demo_zh.png, with the toy example's model.

    PYTHONPATH=.:tests python docs/figures/web_demo.py

Needs gradio, selenium, Chromium with its driver, and a Chinese font. The page shows the first held-out picture, with
its first question in each language.
"""

import json
from pathlib import Path
from time import sleep

from test_web_demo import browser, find, idle, served, type_in, until

DOCS = Path(__file__).parent.parent
MODEL = "output/openmoji/stage2"
HELD_OUT = Path("output/openmoji/data/heldout")


def main() -> None:
    # The first picture's first question in each language
    picture = min(path.name for path in (HELD_OUT / "images_dl").iterdir())
    questions: dict[str, str] = {}
    for record in json.loads((HELD_OUT / "chat.json").read_text(encoding="utf-8")):
        if record["image"] == picture:
            question = record["conversations"][0]["value"].replace("<image>", "").strip()
            questions.setdefault(record["language"], question)

    # The page in both languages
    with served("--model_name_or_path", MODEL) as address:
        for language, name in (("en-US", "web_demo.png"), ("zh-CN", "web_demo_zh.png")):
            with browser(address, language) as driver:
                size = {"width": 1100, "height": 900, "deviceScaleFactor": 1, "mobile": False}
                driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
                until(lambda: find(driver, "#examples button"))[0].click()
                until(lambda: find(driver, ".thumbnail-item"))
                for answers, question in enumerate(questions.values(), start=1):
                    type_in(driver, question)
                    until(lambda answers=answers: idle(driver, answers))
                sleep(1)  # the page scrolls
                driver.save_screenshot(str(DOCS / name))


if __name__ == "__main__":
    main()
