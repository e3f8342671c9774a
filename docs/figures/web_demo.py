"""Takes the chat page's two pictures, docs/web_demo.png and docs/web_demo_zh.png, with the toy example's model.

    PYTHONPATH=.:tests python docs/figures/web_demo.py

Needs gradio, selenium, Chromium with its driver, and a Chinese font. The page shows the first held-out picture and
three questions about it, the same in each language.
"""

from pathlib import Path
from time import sleep

from test_web_demo import browser, find, idle, served, type_in, until

DOCS = Path(__file__).parent.parent
MODEL = "output/openmoji/stage2"
ENGLISH = ["Describe the picture.", "How many things are there?", "What colour is the background?"]
CHINESE = ["描述这张图片。", "有几个东西？", "背景是什么颜色？"]


def main() -> None:
    # The page in both languages
    with served("--model_name_or_path", MODEL) as address:
        pages = (("en-US", "web_demo.png", ENGLISH), ("zh-CN", "web_demo_zh.png", CHINESE))
        for language, name, questions in pages:
            with browser(address, language) as driver:
                size = {"width": 1100, "height": 900, "deviceScaleFactor": 1, "mobile": False}
                driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
                until(lambda: find(driver, "#examples button"))[0].click()
                until(lambda: find(driver, ".thumbnail-item"))
                for answers, question in enumerate(questions, start=1):
                    type_in(driver, question)
                    until(lambda answers=answers: idle(driver, answers))
                sleep(1)  # the page scrolls
                driver.save_screenshot(str(DOCS / name))


if __name__ == "__main__":
    main()
