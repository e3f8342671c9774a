"""What the chat page says, in two languages, and how it looks."""

from html import escape

from peft import PeftModel

from train_llava.model import Llava, count_parameters

TEXTS = {
    "en": {
        "ask_here": "Drop a picture here and ask",
        "nothing_yet": "Choose a picture, and ask what is in it.",
        "chat": "Chat",
        "with_adapter": "With the adapter",
        "without_adapter": "Without it",
        "stop": "Stop",
        "retry": "Retry",
        "clear": "Clear",
        "temperature": "Temperature",
        "waiting": "The model is answering others. Questions before yours: ",
    },
    "zh": {
        "ask_here": "拖入或粘贴图片，然后提问",
        "nothing_yet": "选一张图片，问问图里有什么。",
        "chat": "对话",
        "with_adapter": "加载 LoRA 权重",
        "without_adapter": "不加载 LoRA 权重",
        "stop": "停止",
        "retry": "重新回答",
        "clear": "清空",
        "temperature": "采样温度",
        "waiting": "模型正在回答其他人，排在前面的提问数：",
    },
}
# What the header calls the parts of a model
HEADER = {
    "en": {
        "vision tower": "Vision tower",
        "projector": "Projector",
        "language model": "Language model",
        "adapter": "LoRA adapter",
        "no_adapter": "No LoRA adapter",
        "made_of": "Made of ",
    },
    "zh": {
        "vision tower": "视觉塔",
        "projector": "投影层",
        "language model": "语言模型",
        "adapter": "LoRA 权重",
        "no_adapter": "未加载 LoRA 权重",
        "made_of": "来源：",
    },
}
# An answer of which there is nothing to read yet
DOTS = '<span class="dots"><i></i><i></i><i></i></span>'
# The first rule hides Gradio's buttons that would empty a chat without the conversation behind it, or send a picture
# to the hub, by their place, as their labels are in the browser's language. Texts are sent as HTML: `white-space`.
CSS = """
.wrapper > .icon-button-wrapper, .download-link ~ .icon-button { display: none !important }
.message img { max-height: 240px }
.message-content { white-space: pre-wrap }

.gradio-container { --soft: color-mix(in srgb, var(--body-text-color) 68%, transparent);
  --tint: color-mix(in srgb, var(--body-text-color) 7%, transparent);
  width: 100%; max-width: 1000px !important; margin: 0 auto !important }
.gradio-container > .main { padding: 0 !important }
.gradio-container main { padding: 18px clamp(10px, 2vw, 20px) 8px !important }
.gradio-container .column { gap: 10px }

#model { padding: 0 4px }
#model .html-container, #waiting .html-container { padding: 0 }
#model h1 { font-size: 20px; font-weight: 650; margin: 0 0 8px; overflow-wrap: anywhere }
#model ul { display: flex; flex-wrap: wrap; gap: 6px; list-style: none; margin: 0; padding: 0 }
#model li { margin: 0; padding: 2px 10px; border-radius: 99px; font-size: 13px;
  background: var(--tint); color: var(--soft) }
#model li b { font-weight: 600; color: var(--body-text-color) }
#model p { margin: 8px 0 0; font-size: 13px; color: var(--soft); overflow-wrap: anywhere }

#chats { flex-wrap: nowrap; gap: 10px }
#chats > * { min-width: 0 !important; border-radius: 16px; box-shadow: none }
#chats .placeholder { color: var(--soft) }
#chats .message { border: 0; border-radius: 16px; box-shadow: none; font-size: 15px; line-height: 1.5 }
#chats .bot.message { background: var(--tint) }
#chats .user.message { background: var(--color-accent-soft) }
#chats .message .message { padding: 0 }
#chats .role.message, #chats .flex-wrap > .message { padding: 8px 14px }
#chats .message-buttons { opacity: .6; margin-block: 0 }
#chats .message-row:has(.dots) + .message-buttons { visibility: hidden }

.dots { display: inline-flex; gap: 5px; padding: 6px 0 }
.dots i { width: 7px; height: 7px; border-radius: 50%; background: var(--soft);
  animation: dots 1.2s infinite ease-in-out }
.dots i:nth-child(2) { animation-delay: .15s }
.dots i:nth-child(3) { animation-delay: .3s }
@keyframes dots { 0%, 70%, 100% { opacity: .25 } 35% { opacity: 1; transform: translateY(-3px) } }
#waiting { padding: 0 6px; font-size: 13px; color: var(--soft) }
#waiting:not(:has(p)) { display: none }
#waiting p { margin: 0 }

#box { border: 1px solid var(--border-color-primary) !important }
.form:has(#box) { border: 0; background: none; box-shadow: none; overflow: visible }
#box, #box :is(.full-container, .input-container, .input-wrapper) { border-radius: 16px !important; box-shadow: none }
#box textarea { font-size: 16px }
#box .submit-button, #box .upload-button { border-radius: 99px; background: transparent }
#box .submit-button:not(:disabled) { background: var(--color-accent); color: white }

#controls { gap: 6px; align-items: center; flex-wrap: wrap }
#controls button.lg { flex: 0 0 auto; min-width: 0; padding: 5px 14px; border-radius: 99px; font-size: 14px;
  font-weight: 500; background: transparent; border: 1px solid var(--border-color-primary);
  color: var(--body-text-color); box-shadow: none }
#controls button.lg:hover:not(:disabled) { border-color: var(--color-accent); color: var(--color-accent) }
#controls button.lg:disabled { opacity: .4 }
#controls .form { flex: 0 1 330px !important; margin-left: auto; border: 0; background: none; box-shadow: none }
#temperature { padding: 0; min-width: 0 !important; background: none }
#temperature .slider_input_container { margin-top: 0 }
#temperature .head span { font-size: 13px; white-space: nowrap }

#examples { gap: 8px; flex-wrap: nowrap; overflow-x: auto; scrollbar-width: thin; width: 0; min-width: 100% }
#examples button { flex: 1 0 88px; max-width: 120px; min-width: 0; flex-direction: column; gap: 4px; padding: 8px 4px;
  border-radius: 12px; background: transparent; border: 1px solid var(--border-color-primary); box-shadow: none;
  font-size: 12px; font-weight: 400; line-height: 1.25; color: var(--soft);
  justify-content: flex-start; white-space: normal }
#examples button:hover { border-color: var(--color-accent); color: var(--body-text-color) }
#examples img { width: 52px; height: 52px; object-fit: contain; margin: 0; border-radius: 6px; background: white }

@media (max-width: 640px) {
  #chats { gap: 6px }
  #chats .bubble-wrap { padding: 6px !important }
  #chats > * { height: 48dvh !important }
  #chats .flex-wrap, #chats .message { max-width: 100%; font-size: 14px }
  #controls .form { flex-basis: 100% !important }
  #examples button { flex: 0 0 80px }
}
@media (max-width: 440px) { /* two chats stand one below the other */
  #chats:has(> :nth-child(2)) { flex-direction: column }
  #chats > :not(:only-child) { height: 38dvh !important; min-height: 200px !important }
}
"""
# Gradio's own would copy a message as it was sent to the page, which is as HTML
COPY = """() => document.addEventListener("click", event => {
    if (event.target.closest(".message-buttons .icon-button-wrapper > button")) {
        const message = event.target.closest(".message-buttons").previousElementSibling
        event.stopPropagation()
        getSelection().selectAllChildren(message.querySelector(".message-content"))
        document.execCommand("copy")
    }
}, true)"""


def header(model: Llava | PeftModel, title: str, made_of: list[str], language: str) -> str:
    """The head of the page as HTML: the model's name, its parts with their sizes, and what it was made of."""
    words, config = HEADER[language], model.config
    tower = config.vision_config.model_type.removesuffix("_vision_model")
    kinds = {"vision tower": f"{tower} ", "language model": f"{config.get_text_config().model_type} "}
    sizes = {part: size for part, (_, size) in count_parameters(model).items()}
    if isinstance(model, PeftModel):  # its matrices lie inside the language model
        sizes["adapter"] = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
        sizes["language model"] -= sizes["adapter"]
        kinds["adapter"] = f"r = {model.active_peft_config.r}, "
    facts = [
        f"{words[part]} <b>{kinds.get(part, '')}{size / 1e6:,.{0 if size >= 1e7 else 2}f} M</b>"
        for part, size in sizes.items()
    ]
    if not isinstance(model, PeftModel):
        facts.append(words["no_adapter"])
    origin = f"<p>{words['made_of']}{escape(' · '.join(made_of))}</p>" if made_of else ""
    text = f"<h1>{escape(title)}</h1><ul><li>{'</li><li>'.join(facts)}</li></ul>{origin}"
    return text.replace("{", "&#123;").replace("}", "&#125;")  # in a translation, braces stand around a variable
