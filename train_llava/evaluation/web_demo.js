/* Copies a message as it is shown. Gradio's own button would copy the HTML that was sent to the page. */
() => document.addEventListener("click", event => {
    if (event.target.closest(".message-buttons .icon-button-wrapper > button")) {
        const message = event.target.closest(".message-buttons").previousElementSibling
        event.stopPropagation()
        getSelection().selectAllChildren(message.querySelector(".message-content"))
        document.execCommand("copy")
    }
}, true)
