/* [class or name, contrast] of each element with text, its background's layers painted in order. */
(() => {
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const painted = (colours) => {
    for (const colour of colours) {
      context.fillStyle = colour;
      context.fillRect(0, 0, 1, 1);
    }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (colours) => {
    const linear = painted(colours).map((byte) => {
      const value = byte / 255;
      return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const shown = element.checkVisibility() && !["SCRIPT", "OPTION"].includes(element.tagName);
    if (!own || !shown) continue;
    const behind = [];
    for (let around = element; around; around = around.parentElement) {
      behind.unshift(getComputedStyle(around).backgroundColor);
    }
    const both = [luminance(behind), luminance([...behind, getComputedStyle(element).color])];
    const contrast = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    found.push([element.className || element.tagName, contrast]);
  }
  return found;
})()
