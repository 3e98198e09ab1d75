// Forms that send what is in them, and show what the service says of a field beside that field.

import { ApiError } from "./api.js";

let count = 0;

/** Sends a form with `send`, which may throw ApiError. One submission at a time. */
export function onSubmit(form, send) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button:not([type=button])");
    if (button.disabled) return;
    button.disabled = true;
    clear(form);
    try {
      await send();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      show(form, error);
    } finally {
      button.disabled = false;
    }
  });
}

/** What was filled in, by name; numbers as numbers. */
export function filledIn(form) {
  const fields = [...form.elements].filter(({ name, value }) => name && value !== "");
  return Object.fromEntries(fields.map(({ name, type, value }) => [name, type === "number" ? Number(value) : value]));
}

function show(form, error) {
  const told = document.createElement("p");
  Object.assign(told, { className: "error", id: `error-${++count}`, textContent: error.message });
  told.setAttribute("role", "alert");
  const field = error.param && form.elements.namedItem(error.param);
  if (field) {
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-describedby", told.id);
    field.closest("label").after(told);
    field.focus();
  } else {
    form.append(told);
  }
}

function clear(form) {
  for (const told of form.querySelectorAll(".error")) told.remove();
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
}
