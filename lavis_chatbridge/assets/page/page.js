() => {
  const name = (medium) => decodeURIComponent((medium.currentSrc || medium.src).split(/[/?#]/).pop() || 'medium');
  const label = () => document.querySelectorAll('#conversation :is(img, video, audio)').forEach((medium) => {
    if (medium.dataset.named || !(medium.currentSrc || medium.src)) return;
    medium.dataset.named = name(medium);
    medium.title = medium.ariaLabel = name(medium);
    if (medium.tagName === 'IMG') medium.alt = name(medium);
    const button = medium.closest('button');
    if (button && !button.innerText.trim()) button.ariaLabel = name(medium);
  });
  // What gradio leaves for screen readers to stumble over.
  const mend = () => {
    document.querySelectorAll('#message textarea:not([aria-label])').forEach((one) => { one.ariaLabel = 'Your message'; });
    document.querySelectorAll('.examples[role=list]').forEach((one) => one.removeAttribute('role'));
    document.querySelectorAll('.example-icon[aria-label]:not([role])').forEach((one) => { one.role = 'img'; });
    document.querySelectorAll('#conversation button[aria-label=""]').forEach((one) => { one.ariaLabel = 'Download'; });
    document.querySelectorAll('#conversation [role=button]:has(button)').forEach((one) => {
      one.removeAttribute('role');
      one.removeAttribute('tabindex');
      const button = one.querySelector('button');
      if (!button.ariaLabel && !button.innerText.trim()) button.ariaLabel = 'Show or hide';
    });
  };
  const all = {childList: true, subtree: true, attributes: true};
  new MutationObserver(() => { label(); mend(); }).observe(document.body, all);
}
