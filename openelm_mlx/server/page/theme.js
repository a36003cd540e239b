"use strict";(()=>{try{let e=localStorage.getItem("openelm_mlx.theme");(e==="light"||e==="dark")&&(document.documentElement.dataset.theme=e)}catch{}})();
