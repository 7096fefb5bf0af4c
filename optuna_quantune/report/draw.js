"use strict";
// Draws the figures, which stand in the page as data.
const figures = JSON.parse(document.getElementById("figures").textContent);
const isTouched = window.matchMedia("(hover: none)").matches;
const settings = {
  responsive: true,
  displaylogo: false,
  // Buttons lie over the figure where nothing hovers.
  displayModeBar: isTouched ? false : "hover",
  // These alone: newer versions of plotly.js have one that uploads the figure.
  modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "autoScale2d", "resetScale2d"]],
  plotlyServerURL: "",
};
const drawn = figures.map((figure, place) => {
  const element = document.getElementById(`figure-${place}`);
  if (isTouched) {
    figure.layout.dragmode = false; // a finger on a figure scrolls the page
  }
  Plotly.newPlot(element, figure.data, figure.layout, settings);
  return element;
});
// Paper has a width of its own.
for (const event of ["beforeprint", "afterprint"]) {
  window.addEventListener(event, () => drawn.forEach((element) => Plotly.Plots.resize(element)));
}
