const KEY = 'modelharbor.token';

/**
 * The token that the address brought in its fragment, else the one that this browser tab keeps.
 * A fragment never leaves the browser; it is taken out of the address bar and the history at once.
 */
export function takeToken(): string | null {
  const token = readFragment();
  if (token === null) return sessionStorage.getItem(KEY);
  history.replaceState(history.state, '', location.pathname + location.search);
  sessionStorage.setItem(KEY, token);
  return token;
}

function readFragment(): string | null {
  return new URLSearchParams(location.hash.slice(1)).get('token');
}

// Another token pasted into the address bar of the open page changes the fragment only: start anew.
addEventListener('hashchange', () => {
  if (readFragment() !== null) {
    takeToken();
    location.reload();
  }
});
