// What the page says, in two languages.
"use strict";

const WORDS = {
  en: {
    title: "Chat", settings: "Settings", fresh: "New chat", send: "Send", stop: "Stop",
    ask: "Ask something…", system: "System prompt", temperature: "Temperature", topP: "Top p",
    maxTokens: "Tokens at most", tools: "Tools (JSON list, as OpenAI's API has them)",
    key: "API key", keyNote: "Kept in this tab alone.", language: "Language", model: "Model",
    close: "Done", copy: "Copy", copied: "Copied", retry: "Retry", thinking: "Thinking…",
    thought: "Thoughts", stopped: "stopped", cut: "cut: no room or no tokens left",
    speed: "{rate} tokens/s", tokens: "{count} tokens", first: "first after {seconds} s",
    call: "Call", result: "Result of the call", sendResults: "Send results",
    needsKey: "The server needs an API key: enter it in the settings.",
    unreachable: "The server does not answer.", full: "The server is full: try again in {seconds} s.",
    badTools: "Tools: not a JSON list", badNumber: "{field}: not a number",
    you: "You", it: "Model", save: "Save",
  },
  zh: {
    title: "对话", settings: "设置", fresh: "新对话", send: "发送", stop: "停止",
    ask: "输入消息…", system: "系统提示词", temperature: "温度", topP: "Top p",
    maxTokens: "最多词元数", tools: "工具（JSON 列表，格式同 OpenAI API）",
    key: "API 密钥", keyNote: "仅保存在此标签页中。", language: "语言", model: "模型",
    close: "完成", copy: "复制", copied: "已复制", retry: "重试", thinking: "思考中…",
    thought: "思考过程", stopped: "已停止", cut: "已截断：空间或词元数用尽",
    speed: "{rate} 词元/秒", tokens: "{count} 个词元", first: "首个词元 {seconds} 秒",
    call: "调用", result: "调用结果", sendResults: "发送结果",
    needsKey: "服务器需要 API 密钥：请在设置中填写。",
    unreachable: "服务器没有响应。", full: "服务器繁忙：请在 {seconds} 秒后重试。",
    badTools: "工具：不是 JSON 列表", badNumber: "{field}：不是数字",
    you: "你", it: "模型", save: "保存",
  },
};
