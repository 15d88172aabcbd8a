// Refresh the content of the page of `megagrow watch` without reloading it.
"use strict";

const SECONDS = 5;
const content = document.getElementById("content");
const state = document.getElementById("state");
let version = "";

async function refresh() {
  try {
    const answer = await fetch("content", { headers: { "If-None-Match": version } });
    if (answer.status === 200) {
      const method = document.getElementById("method");
      const open = method !== null && method.open;
      content.innerHTML = await answer.text();
      version = answer.headers.get("ETag");
      if (open) document.getElementById("method")?.setAttribute("open", "");
      document.title = content.querySelector("h1").textContent;
    } else if (answer.status !== 304) {
      throw new Error(answer.statusText);
    }
    state.textContent = "updated " + new Date().toLocaleTimeString();
  } catch (error) {
    state.textContent = "no connection to megagrow watch";
  }
  setTimeout(refresh, 1000 * SECONDS);
}

refresh();
