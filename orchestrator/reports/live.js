
"use strict";
// Requests the page's content every few seconds and replaces it, without a reload. Loads nothing from other hosts.
let shown = "", skewMs = 0;

function ago(at) {
  const s = Math.max(0, Math.round((Date.now() - skewMs) / 1000 - at));
  if (s < 100) return s + " s ago";
  if (s < 6000) return Math.round(s / 60) + " min ago";
  return s < 172800 ? Math.round(s / 3600) + " h ago" : Math.round(s / 86400) + " days ago";
}

function showTimes() {
  for (const time of document.querySelectorAll("time[data-at]")) {
    time.title = new Date(1000 * time.dataset.at).toLocaleString();
    time.textContent = ago(Number(time.dataset.at));
  }
}

function show(content) {
  const main = document.querySelector("main");
  const open = Array.from(main.querySelectorAll("details"), one => one.open);
  main.innerHTML = content.html;
  main.querySelectorAll("details").forEach((one, number) => { one.open = open[number] || false; });
  document.title = content.title;
}

async function look() {
  if (!document.hidden) {
    let answers = false;
    try {
      const answer = await fetch("/api" + location.pathname, { cache: "no-cache" });
      if (answer.ok) {
        skewMs = Date.now() - Date.parse(answer.headers.get("Date"));
        const text = await answer.text();
        if (text !== shown) show(JSON.parse(text));
        shown = text;
        answers = true;
      }
    } catch {}  // the server is away
    document.body.classList.toggle("away", !answers);
    showTimes();
  }
  setTimeout(look, LIVE_MS);
}

document.addEventListener("visibilitychange", showTimes);
setInterval(showTimes, 1000);
look();
