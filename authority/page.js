"use strict";
const $ = (id) => document.getElementById(id);
const grace = 1000; // milliseconds in which a fresh ask takes no click
const base64 = (buffer) => btoa(String.fromCharCode(...new Uint8Array(buffer)));
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
let key = "", wanted = "", shown = null, read = false, asks = [], approvers = [], awake = 0, busy = false;

async function call(path, body) {
  const headers = { "Nucleus-Page": key };
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, cache: "no-store", credentials: "omit", redirect: "error" };
  if (body) options.body = JSON.stringify(body);
  const response = await fetch("/api/" + path, options);
  const reply = await response.json();
  if (response.ok) return reply;
  throw Object.assign(new Error(reply.error.message), { status: response.status });
}

function view(name) {
  for (const id of ["locked", "enrol", "queue"]) $(id).hidden = id !== name;
}

function complain(error) {
  // What a browser says when nobody touched the key is no fault of the page.
  const text = error && error.name === "NotAllowedError" ? "The passkey was not used: it was called off, took too long, or did not verify you." : String((error && error.message) || error || "");
  $("error").textContent = text;
  $("error").hidden = text === "";
}

function live(on, text) {
  $("live").className = on ? "on" : "off";
  $("live").textContent = text;
}

// Fresh content, and a window that was just come back to, take no click for a moment: a hand
// that was on its way to something else must not decide.
function doze() {
  awake = Date.now() + grace;
  buttons();
  setTimeout(buttons, grace + 20);
}

function buttons() {
  const open = shown !== null && shown.state === "pending";
  const ready = open && !busy && Date.now() >= awake && document.hasFocus();
  const mine = open && (shown.grants || []).some((g) => g.approver === $("approver").value);
  $("approve").disabled = !ready || !read || mine || approvers.length === 0;
  $("deny").disabled = !ready || approvers.length === 0;
  $("hint").textContent = !open ? "" : busy ? "Your authenticator asks you now." : approvers.length === 0 ? "No passkey is registered for this page." :
    mine ? "This approver has granted it; others have to." : ready ? (read ? "" : "What will happen stands last: read to the end to approve.") : document.hasFocus() ? "Read first." : "This window is not in front.";
}

// What is asked for stands at the end of the text, and has to have been in sight.
function reading() {
  const pre = $("text");
  if (pre.scrollTop + pre.clientHeight < pre.scrollHeight - 4) return;
  read = true;
  buttons();
}

function countdown() {
  const now = Date.now();
  for (const el of document.querySelectorAll("[data-until]")) {
    const left = Math.max(0, Math.round((Number(el.dataset.until) - now) / 1000));
    el.textContent = left === 0 ? "expired" : Math.floor(left / 60) + ":" + String(left % 60).padStart(2, "0") + " left";
    el.classList.toggle("soon", left < 60);
  }
  if (document.hasFocus() !== countdown.front) {
    countdown.front = document.hasFocus();
    buttons();
  }
}

function list() {
  $("count").textContent = asks.length;
  document.title = (asks.length ? "(" + asks.length + ") " : "") + "CAL approvals";
  $("none").hidden = asks.length > 0;
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.ask : undefined;
  $("list").replaceChildren(...asks.map((a) => {
    const button = document.createElement("button"), small = document.createElement("small"), left = document.createElement("span");
    button.type = "button";
    button.dataset.ask = a.id;
    if (shown && shown.id === a.id) button.setAttribute("aria-current", "true");
    left.dataset.until = a.expires_ms;
    small.append("pod " + a.pod + " · ", left);
    if (a.need > 1) small.append(" · " + (a.granted || []).length + " of " + a.need);
    button.append(a.summary, small);
    button.addEventListener("click", () => show(a.id, false));
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
  for (const button of $("list").querySelectorAll("button")) if (button.dataset.ask === focused) button.focus();
  const chosen = $("approver").value;
  $("approver").replaceChildren(...approvers.map((name) => new Option(name, name, false, name === chosen)));
  $("who").hidden = approvers.length < 2;
  countdown();
}

// The text is drawn as wide as there is room: what stands beyond an edge might go unread.
function columns() {
  const pre = $("text"), probe = document.createElement("span"), hidden = $("ask").hidden;
  $("ask").hidden = false;
  probe.textContent = "0".repeat(100);
  pre.append(probe);
  const style = getComputedStyle(pre), room = pre.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  const fit = Math.floor(room / (probe.getBoundingClientRect().width / 100)) - 1;
  probe.remove();
  $("ask").hidden = hidden;
  return Math.min(Math.max(fit || 0, 40), 160);
}

async function show(id, whole) {
  wanted = id;
  try {
    const ask = await call("asks/" + encodeURIComponent(id) + "?columns=" + columns() + (whole ? "&whole=true" : ""));
    if (wanted !== id) return;
    const fresh = !shown || shown.id !== ask.id || shown.text !== ask.text;
    const moved = !shown || shown.id !== ask.id;
    shown = ask;
    $("choose").hidden = true;
    $("ask").hidden = false;
    $("ask-h").textContent = ask.summary;
    $("ask-pod").textContent = "pod " + ask.pod;
    $("ask-left").dataset.until = ask.expires_ms;
    $("ask-need").textContent = ask.need > 1 ? (ask.grants || []).length + " of " + ask.need + " approvals" : "";
    $("text").textContent = ask.text;
    $("cut").hidden = !ask.cut;
    $("ask-id").textContent = ask.id;
    $("ask-digest").textContent = ask.ask_sha256;
    $("approve").textContent = ask.passage ? "Open this passage with passkey" : "Approve once with passkey";
    if (moved) $("reason").value = "";
    outcome(ask);
    if (fresh) {
      read = false;
      $("text").scrollTop = 0;
      doze();
    }
    reading();
    list();
    buttons();
    if (moved) {
      $("ask-h").focus();
      complain("");
    }
  } catch (error) {
    complain(error);
  }
}

function outcome(ask) {
  const by = (ask.grants || []).map((g) => g.approver).join(", "), more = ask.need - (ask.grants || []).length;
  const text = {
    pending: by ? "Granted by " + by + "; nothing is done until " + more + " more of " + ask.need + " have granted it." : "",
    granted: "Granted by " + by + ".", denied: "Denied" + (ask.reason ? ": " + ask.reason : "."), expired: "Nobody answered in time.",
    withdrawn: "No longer asked" + (ask.reason ? ": " + ask.reason : "."), revoked: "Taken back" + (ask.reason ? ": " + ask.reason : "."),
  }[ask.state] ?? ask.state;
  $("outcome").textContent = text;
  $("outcome").hidden = text === "";
  $("outcome").className = ask.state === "granted" || ask.state === "pending" ? "" : "no";
  $("decide").hidden = ask.state !== "pending";
}

async function decide(event, act) {
  event.preventDefault();
  // A click that a script made is none of a person; and the buttons may sleep.
  if (!event.isTrusted || event.currentTarget.disabled || busy || Date.now() < awake || !shown) return;
  const ask = shown, said = { ask_sha256: ask.ask_sha256, approver: $("approver").value, reason: $("reason").value };
  busy = true;
  buttons();
  complain("");
  try {
    await act("asks/" + encodeURIComponent(ask.id) + "/", said);
  } catch (error) {
    complain(error);
  }
  busy = false;
  await show(ask.id, false).then(() => { if (!$("outcome").hidden) $("ask-h").focus(); });
}

async function approve(path, said) {
  const asked = await call(path + "challenge", said);
  const got = await navigator.credentials.get({ publicKey: {
    challenge: bytes(asked.challenge), rpId: asked.rp_id, userVerification: "required", timeout: 120000,
    allowCredentials: [{ type: "public-key", id: bytes(asked.credential) }],
  } });
  await call(path + "grant", {
    challenge: asked.challenge, client_data: base64(got.response.clientDataJSON),
    authenticator_data: base64(got.response.authenticatorData), signature: base64(got.response.signature),
  });
}

async function watch() {
  for (let known = ""; ;) {
    try {
      const now = await call("asks?known=" + known);
      if (known === "") localStorage.setItem("key", key);
      known = now.state;
      asks = now.asks;
      approvers = now.approvers;
      live(true, "connected");
      view("queue");
      list();
      if (wanted && (!shown || shown.id !== wanted || shown.state === "pending")) await show(wanted, false);
      buttons();
    } catch (error) {
      if (error.status === 401) {
        // A link may come from anywhere: a key in it that is none leaves the one that is kept.
        const kept = localStorage.getItem("key") || "";
        if (kept !== key) {
          key = kept;
          known = "";
          continue;
        }
        localStorage.removeItem("key");
        live(false, "locked");
        view("locked");
        return;
      }
      live(false, "the authority does not answer");
      known = "";
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }
}

async function enrol(enrolment) {
  view("enrol");
  try {
    const on = await call("enrolment", { enrolment });
    live(true, "connected");
    $("enrol-name").textContent = on.name;
    $("enrol-go").disabled = false;
    $("enrol-go").addEventListener("click", async (event) => {
      if (!event.isTrusted) return;
      $("enrol-go").disabled = true;
      complain("");
      try {
        const made = await navigator.credentials.create({ publicKey: {
          rp: { id: on.rp_id, name: "CAL approvals on " + on.host }, user: { id: bytes(on.user), name: on.name, displayName: on.name },
          challenge: bytes(on.challenge), pubKeyCredParams: [{ type: "public-key", alg: -7 }], attestation: "none", timeout: 120000,
          authenticatorSelection: { residentKey: "discouraged", userVerification: "required" },
          excludeCredentials: on.known.map((id) => ({ type: "public-key", id: bytes(id) })),
        } });
        const told = await call("enrolment/passkey", {
          enrolment, credential: base64(made.rawId), public_key: base64(made.response.getPublicKey()),
          client_data: base64(made.response.clientDataJSON), authenticator_data: base64(made.response.getAuthenticatorData()),
        });
        $("fingerprint").textContent = told.fingerprint;
        $("enrol-ask").hidden = true;
        $("enrol-made").hidden = false;
        $("fingerprint").focus();
      } catch (error) {
        complain(error);
        $("enrol-go").disabled = false;
      }
    });
  } catch (error) {
    complain(error);
    $("enrol-ask").hidden = true;
  }
}

function start() {
  const given = new URLSearchParams(location.hash.slice(1));
  const secret = given.get("enrol");
  key = given.get("key") || localStorage.getItem("key") || ""; // it is kept once the authority has answered to it
  wanted = given.get("ask") || "";
  // Neither key nor link stays in the address, from which it would be copied or kept.
  history.replaceState(null, "", wanted ? "#ask=" + encodeURIComponent(wanted) : "/");
  $("origin").textContent = location.origin;
  if (secret) enrol(secret); else watch();
}

$("approve").addEventListener("click", (event) => decide(event, approve));
$("deny").addEventListener("click", (event) => decide(event, (path, said) => call(path + "denial", said)));
$("decide").addEventListener("submit", (event) => event.preventDefault());
$("whole").addEventListener("click", () => show(shown.id, true));
$("approver").addEventListener("change", buttons);
$("text").addEventListener("scroll", reading);
addEventListener("focus", doze);
let resized = 0;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => { if (shown) show(shown.id, false); }, 300);
});
addEventListener("blur", buttons);
document.addEventListener("visibilitychange", doze);
addEventListener("hashchange", () => { if (/^#(key|ask|enrol)=/.test(location.hash)) location.reload(); });
setInterval(countdown, 1000);
start();
