// Runs before anything is drawn: sets the theme that was chosen in this browser; the default is the system's.
try {
  const theme = localStorage.getItem('magistral.theme');
  if (theme) document.documentElement.dataset.theme = theme;
} catch { /* a browser without storage */ }
